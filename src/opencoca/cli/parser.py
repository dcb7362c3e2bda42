"""The parser of all commands: short help first, and one sentence for each mistake."""

import argparse
from typing import Any, NoReturn

from opencoca.system.names import did_you_mean


class CommandError(Exception):
    """Ends the command with this sentence on stderr and this exit code."""

    def __init__(self, sentence: str, exit_code: int = 2):
        super().__init__(sentence)
        self.exit_code = exit_code


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends an option's help with its default, unless the help speaks of that itself or the option is a switch."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        has_default = bool(action.default) and action.default not in (True, argparse.SUPPRESS)
        return text + " (default: %(default)s)" if has_default and "default:" not in text else text


class Parser(argparse.ArgumentParser):
    """Reports mistakes in the arguments as one sentence, with the name that was probably meant.

    It takes no abbreviated options. `--help` shows the usual options, `--help-all` the rare ones and `details` too.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self.details = ""
        self._rare: list[argparse._ArgumentGroup] = []

    def add_rare_group(self, title: str) -> "argparse._ArgumentGroup":
        """Adds a group of options that only --help-all shows."""
        if not self._rare:
            self.add_argument("--help-all", action=_HelpAll, nargs=0, help="show all options and exit")
        group = self.add_argument_group(title)
        self._rare.append(group)
        return group

    def format_help(self, everything: bool = False) -> str:
        hidden = [] if everything else [action for group in self._rare for action in group._group_actions]
        texts = [action.help for action in hidden]
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            text = super().format_help()
        finally:
            for action, shown in zip(hidden, texts, strict=True):
                action.help = shown
        if everything and self.details:
            return f"{text}\n{self.details}\n"
        more = f"\n`{self.prog} --help-all` shows {len(hidden)} more options.\n"
        return text + more if hidden else text

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            if not name.startswith("-"):
                self.error(f"the argument {name!r} is one too many")
            options = [option for action in self._actions for option in action.option_strings]
            self.error(f"there is no option {name}{did_you_mean(name.replace('_', '-'), options)}")
        return found, unknown

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [name for name in map(str, action.choices) if "_" not in name]
            meant = did_you_mean(str(value), known)
            fault = f"is not known{meant}" if meant else f"is none of {', '.join(known)}"
            raise argparse.ArgumentError(action, f"{value!r} {fault}")

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; `{self.prog} --help` explains the command")


class _HelpAll(argparse.Action):
    """Prints the whole help."""

    def __call__(self, parser: Any, *_: object) -> NoReturn:
        print(parser.format_help(everything=True), end="")
        raise SystemExit(0)
