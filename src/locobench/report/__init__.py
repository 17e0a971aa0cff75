"""The report of a study or of a folder of runs: a page, plots, a table. Reads files, runs nothing."""
