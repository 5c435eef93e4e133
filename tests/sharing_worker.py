"""One of two ranks on one GPU: a sum over both, and a value from each to the other."""

import os

import torch
import torch.distributed as dist

from ghostvis_mega.session import sharing_environment

rank, device = int(os.environ["RANK"]), torch.device("cuda", 0)
os.environ |= sharing_environment(device, rank=rank)
torch.cuda.set_device(device)
dist.init_process_group("nccl")
total = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(total)
assert total.eq(3.0).all()
sent, received = torch.full((8,), float(rank), device=device), torch.empty(8, device=device)
exchange = [dist.P2POp(dist.isend, sent, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
for request in dist.batch_isend_irecv(exchange):
    request.wait()
assert received.eq(float(1 - rank)).all()
dist.destroy_process_group()
