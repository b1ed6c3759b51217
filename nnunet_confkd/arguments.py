"""The parser of the commands: errors are short, and a mistyped option is told with the option that is most like it."""
from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from typing import NoReturn

from nnunet_confkd.errors import InputError, did_you_mean


class Parser(argparse.ArgumentParser):
    """The parser of argparse, which tells an unknown option before all else, and errors without the list of options."""

    def parse_known_args(self, args=None, namespace=None):  # parse_args calls it
        """Parse arguments as argparse does. Raises InputError for an unknown option."""
        words = sys.argv[1:] if args is None else list(args)
        words = words[:words.index("--")] if "--" in words else words
        unknown = [word for word in words if self._is_unknown(word)]
        if unknown:
            raise unknown_arguments(unknown, self._option_string_actions)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Exit with what is wrong. argparse would list all options before it."""
        self.exit(2, f"{self.prog}: {message}\n'{self.prog} --help' shows an example and all options.\n")

    def _is_unknown(self, word: str) -> bool:
        """Whether a word is an option, as argparse sees it, and none of the parser's, nor short for one."""
        if not re.match(r"-[^\d.\s]\S*$", word):  # a number, or a text with blanks, is a value
            return False
        name = word.partition("=")[0]
        joined = not word.startswith("--") and word[:2] in self._option_string_actions  # -d27
        return not joined and not any(option.startswith(name) for option in self._option_string_actions)


def unknown_arguments(words: Iterable[str], options: Iterable[str]) -> InputError:
    """Return the error that arguments are unknown, each with the option that is most like it.

    Args:
        words: The arguments.
        options: The options that there are.
    """
    options = list(options)
    return InputError("unknown argument " + ", ".join(
        f"'{word}'{did_you_mean(word.partition('=')[0], options)}" for word in words))
