"""Run by test_eval_answers.py in a process of its own: evaluations that are killed, and evaluations that resume them.

Usage: eval_and_die.py DATA OUTPUT PLACE..., with places like "block:4" (when that many answers of that mode are there)
or "never:0". Each place gets a directory of its own in OUTPUT, and a run that dies there and one that goes on; or a
single run that never dies.
Prints one line per place: its name and the signal that ended the first run.

The libraries take seconds to import, so it is done once, and every run is a fork made before they are used.
"""

import os
import signal
import sys
from pathlib import Path

from blockrag.evaluation.answers import AnswerSettings, answer_questions, modes_named
from blockrag.evaluation.questions import read_questions
from blockrag.model.block_model import BlockModel


def run(data, output, dies):
    """One run."""

    def progress(mode, done):
        if (mode, done) == dies:
            # Like a power cut: nothing is flushed, closed or caught.
            os.kill(os.getpid(), signal.SIGKILL)

    answer_questions(
        BlockModel.from_pretrained("demo"),
        read_questions(data),
        modes_named(["full", "block", "block-no-reencode"]),
        AnswerSettings(max_new_tokens=12, batch_size=4),
        output,
        label="demo",
        made={},
        progress=progress,
    )


def forked(data, output, dies):
    """One run in a process of its own; returns the signal that ended it, 0 for none."""
    child = os.fork()
    if not child:
        status = 1
        try:
            run(data, output, dies)
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"the run that dies at {dies} failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def main():
    """Kill and resume at every place."""
    data, output, *places = sys.argv[1:]
    for place in places:
        mode, _, done = place.partition(":")
        directory = Path(output) / mode
        ended = forked(data, directory, (mode, int(done)))
        if ended:
            forked(data, directory, None)
        sys.stdout.write(f"{mode} {ended}\n")


if __name__ == "__main__":
    main()
