"""The command line: training, merging, what files hold, checkpoints in other formats, text."""

from jlora.cli.running import main as main
