"""`python -m tools.preprocess`: raw data to prepared datasets. Thin: parse, call, print."""
