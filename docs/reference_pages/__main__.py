"""`python -m reference_pages`: write the generated pages."""

from reference_pages.pages import FOLDER, pages

for name, text in pages().items():
    (FOLDER / name).write_text(text, encoding="utf-8")
    print(FOLDER / name)
