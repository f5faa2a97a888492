"""Errors a user can cause: each message says what was wrong, where, and what to do."""


class UserError(ValueError):
    """Bad input. The command line shows the message alone, without a traceback, and exits with 1."""


class ConfigError(UserError):
    """A configuration file or a `--set` override that does not describe a run."""


class DataError(UserError):
    """Text, tokens or a tokenizer that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint or run directory that is damaged, unfinished or of another kind."""


class FormatError(UserError):
    """A packed model that is damaged, from a later version, or beyond what this reader can represent."""


class MissingExtraError(UserError):
    """An optional package is needed and not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}. Install it with: pip install 'bitquest[{extra}]'")
