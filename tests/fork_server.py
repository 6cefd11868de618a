"""What the commands import: `tests.commands` forks every rank from a process that has imported this module.

The imports take about ten seconds, a toy training about one.
"""

import gc
import os
import sys
from pathlib import Path

import deepspeed.checkpoint.ds_to_universal
import deepspeed.runtime.zero.muon.muon_optimizer
import deepspeed.runtime.zero.stage3  # noqa: F401
import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401
import pytest  # noqa: F401
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from deepspeed.comm.torch import build_shm_op

import blockft.digest
import blockft.stages.cache
import blockft.stages.evaluate
import blockft.stages.export
import blockft.stages.generate
import blockft.stages.train
import blockft.training.run_callback
import blockft.training.trainer
import blockft.training.universal_checkpoint  # noqa: F401
from blockft.training.compiler_lock import watch_compiler_locks

# DeepSpeed builds an op for communication on a CPU, with the ninja that is installed beside Python
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
if not torch.cuda.is_available():
    watch_compiler_locks()  # a build that was killed has left its lock
    build_shm_op()
    sys.stdout.flush()  # otherwise every rank would print what DeepSpeed says of the build
# on a slow machine every verification of files would be reported on stderr
blockft.digest._REPORTED_S = 3600
# collections of garbage in the ranks pass over all that is imported here
gc.freeze()
