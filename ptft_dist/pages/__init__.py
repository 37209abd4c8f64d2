"""Reports of runs as tables and as HTML pages: `ptft report` and `ptft compare`. Imports no torch."""
