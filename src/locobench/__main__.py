"""`python -m locobench` does what the `locobench` command does."""

from locobench.cli import main

if __name__ == "__main__":
    main()
