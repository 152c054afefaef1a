"""What the trainer raises when a run, rather than its input, is at fault."""


class RunFailed(Exception):
  """Stops a run that cannot go on, such as one whose loss is not finite.

  The command line prints the message and leaves with status 1; whatever was
  saved before stays usable.
  """


class ProcessLost(RunFailed):
  """Stops a process that lost another; all should be started again."""


class FailedTogether(RunFailed):
  """Stops a process because another failed; process 0 says why."""
