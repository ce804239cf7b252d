"""The commands of `ksag`: a file for each, and files for their common parts."""
