"""The two ways a run ends early, and the exit codes they become."""

import errno

# Of an OSError that no other input would have spared: the disk is full, or fails.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class InputError(ValueError):
    """Bad input: one sentence naming the file, the row or field, and what was expected. Exit code 2."""

    exit_code = 2


class RunError(RuntimeError):
    """A run that failed on good input (non-finite loss, full disk, lost worker). Exit code 1."""

    exit_code = 1
