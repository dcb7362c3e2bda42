"""The category of this package's own warnings; a command shows them as sentences, and those of libraries not at all."""


class Notice(UserWarning):
    """Something that a user should know although the work goes on."""


class LeftOut(Notice):
    """Images that were asked for are left out; a command that reads images ends with exit code 2 after it."""
