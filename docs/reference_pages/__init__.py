"""Writes the pages in docs/reference that follow from the code: `make reference`.

`PYTHONPATH=docs python -m reference_pages` writes them; tests/test_docs_reference.py fails when one is stale.
"""
