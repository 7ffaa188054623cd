"""An order of a PEFT model that torch's fully_shard has sharded, against that of the whole model.

For two processes under torchrun (gloo). Prints "the same" once a process for each of two models.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

import rankwise
from rankwise import surgeon
from rankwise.curvature import read
from test_ordered import CASES, adapted, batches

HOW = {"ladder": (1 / 2, 1 / 4), "trust": 1.0}
surgeon.SLIGHT = 0.0
dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
for case in (case for case in CASES if case.name in ("llama-lm", "ranks")):
    want = rankwise.order(adapted(case), batches(case.of), **HOW)
    model = adapted(case)
    for name, block in model.named_modules():
        if name.rpartition(".")[0].endswith(("layer", "layers")):
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    before = read(model)
    found = rankwise.order(model, batches(case.of), **HOW)
    assert found.order.provenance["looks"] == want.order.provenance["looks"] > 3  # some are undone
    assert found.order.sequence == want.order.sequence
    for count, gates in want.order.gates.items():
        assert_close(found.order.gates[count], gates, rtol=1e-4, atol=1e-5)
    assert found.adapter.weights.keys() == want.adapter.weights.keys()
    for key, tensor in want.adapter.weights.items():
        assert_close(found.adapter.weights[key], tensor)
    for name, factors in read(model).items():  # as it was before
        assert torch.equal(factors.b, before[name].b)
    print("the same", flush=True)
dist.destroy_process_group()
