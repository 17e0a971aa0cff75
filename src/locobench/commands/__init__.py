"""The commands, one file each. What they import at once is light: `--help` should not wait for torch."""
