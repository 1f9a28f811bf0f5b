"""Not a test: what torchrun starts in test_distributed.py. Rank 1 kills itself in mid-run, the first time round.

torchrun --nproc-per-node 2 --max-restarts 3 torchrun_killed.py FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist
from mesh_training import WIDTH, batches, outcome, recipe
from torch import Tensor

from apportion.allocate import Mesh
from apportion.features.distributed import fit_dictionary_over_mesh

folder = Path(sys.argv[1])
restarts, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])


def killing_batches(step: int) -> Tensor:
    if (restarts, rank, step) == (0, 1, 5):
        os.kill(os.getpid(), signal.SIGKILL)
    return batches(step)


dist.init_process_group("gloo")
sae, result = fit_dictionary_over_mesh(
    recipe("MutualChoice", steps=8),
    killing_batches,
    WIDTH,
    Mesh.of(data=1, feature=2),
    folder=folder / "run",
    progress=False,
    log_every=1,
    checkpoint_every=2,
)
if rank == 0:
    found = outcome(sae, result) | {"restarts": restarts, "resumed_from": result.resumed_from}
    (folder / "outcome.json").write_text(json.dumps(found))
# Nobody leaves while another still listens to it.
dist.barrier()
dist.destroy_process_group()
