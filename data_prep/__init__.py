"""Tools that prepare data sets; run as scripts, see README.md."""
