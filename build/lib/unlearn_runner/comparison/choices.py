"""The command line of a script: every mistake is one sentence."""

import argparse
import sys

from unlearn_runner.errors import near


class Parser(argparse.ArgumentParser):
    """A script's options: one sentence for a mistake, with the nearest options for a mistyped one."""

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args=None, namespace=None):
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"there is no option '{unknown[0]}'{near(unknown[0].partition('=')[0], options)}.")
        return found, unknown

    def error(self, message):
        sys.exit(" ".join(message.split()))
