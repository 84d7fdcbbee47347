"""One command: compose a configuration, make a model forget, measure it. See README.md."""

from unlearn_runner.__main__ import command

if __name__ == "__main__":
    command()
