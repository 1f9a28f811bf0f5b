"""Not a test: trains bases once undisturbed and once killed several times; test_matryoshka_training.py compares.

    python killed_distillation.py MODEL FOLDER

Every attempt is a process of its own, forked so that the model is loaded once, and ended with SIGKILL.
"""

import os
import signal
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

from apportion.keys.matryoshka_kv import MatryoshkaKV
from apportion.keys.matryoshka_training import Distillation
from apportion.models import LanguageModel, load

TEXTS = [topics["assignment"], topics["function"]]
HOW = Distillation(steps=24, tokens=16, checkpoint_every=2)
KILLED_AFTER = ("step-00000002", "step-00000008", "step-00000018")


def start(lm: LanguageModel, method: MatryoshkaKV, folder: Path) -> int:
    process = os.fork()
    if process:
        return process
    method.distil(lm, TEXTS, HOW, folder / "training", progress=False)
    method.save(folder / "method")
    os._exit(0)


def main(model: Path, folder: Path) -> None:
    lm = load(model)
    method = MatryoshkaKV().fit(lm, TEXTS, tokens=64)
    assert os.waitpid(start(lm, method, folder / "undisturbed"), 0)[1] == 0
    for checkpoint in KILLED_AFTER:
        process = start(lm, method, folder / "killed")
        while not (folder / "killed/training/checkpoints" / checkpoint).exists():
            time.sleep(0.002)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
    assert os.waitpid(start(lm, method, folder / "killed"), 0)[1] == 0


main(Path(sys.argv[1]), Path(sys.argv[2]))
