"""One rank of a fine-tune over gloo, as Ray Train would run it, that gets no more rows after some steps:
`python hanging_ranks.py PLAN RANK`.

The plan is JSON: {port, address, stuck: RANK, after: STEPS, spec, base, base_hash, data, data_hash, run, hang_seconds}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def _main(plan: dict[str, Any], rank: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(plan["port"])}
    from agents.training import environment

    environment.prepare(use_gpu=False)
    import torch.distributed as dist
    from google.protobuf import json_format

    from agents.link import LinkConfig
    from agents.training.methods import sft
    from agents.training.worker import TrainPayload, train_worker
    from luthier.v1 import training_pb2

    class Starving(sft._Trainer):
        """Its data loader stands still, as one does whose storage has gone away."""

        def get_batch_samples(self, *arguments: Any) -> Any:
            if self.state.global_step >= plan["after"]:
                time.sleep(300)
            return super().get_batch_samples(*arguments)

    if rank == plan["stuck"]:
        sft._Trainer = Starving  # type: ignore[misc]
    dist.init_process_group("gloo")
    train_worker(
        TrainPayload(
            spec=json_format.ParseDict(plan["spec"], training_pb2.FinetuneSpec()).SerializeToString(),
            link=LinkConfig(plan["address"], "job-1", 1, "s" * 40, interval=0.1),
            base_uri=plan["base"],
            base_hash=plan["base_hash"],
            base_name="micro",
            dataset_uri=plan["data"],
            dataset_hash=plan["data_hash"],
            run_uri=plan["run"],
            hang_seconds=plan["hang_seconds"],
        )
    )


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2]))
