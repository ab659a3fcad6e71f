"""The limit: the plain PyTorch loop, the cohort split over processes of one thread, averages in shared memory."""

from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.bench.workloads import WORKLOADS, Stopwatch, Workload, arguments, local_epoch, tensors


def worker(rank: int, workload: Workload, rounds: int, model_vector: Tensor, sums: Tensor, barrier: Any) -> None:
    """Its share of each round's clients, with all samples on the device that it computes on."""
    torch.set_num_threads(1)
    images, labels = (each.to(workload.device) for each in tensors())
    model = workload.build().to(workload.device)
    parameters = list(model.parameters())
    for server_round in range(rounds):
        barrier.wait()
        total = torch.zeros_like(model_vector, device=workload.device)
        for position in range(rank, workload.cohort, workload.workers):
            with torch.no_grad():
                vector_to_parameters(model_vector.to(workload.device, copy=True), parameters)
            shard = workload.shard(server_round * workload.cohort + position)
            local_epoch(model, images[shard], labels[shard])
            with torch.no_grad():
                total += parameters_to_vector(parameters)
        sums[rank].copy_(total)
        barrier.wait()


def main() -> None:
    """Rounds in step with the workers; the first one includes their start."""
    name, rounds, _ = arguments()
    workload = WORKLOADS[name]
    torch.set_num_threads(1)
    watch = Stopwatch()
    model_vector = parameters_to_vector(workload.build().parameters()).detach().share_memory_()  # type: ignore[no-untyped-call]
    sums = torch.zeros(workload.workers, model_vector.numel()).share_memory_()  # type: ignore[no-untyped-call]
    context = mp.get_context("spawn")
    barrier = context.Barrier(workload.workers + 1)
    workers = [
        context.Process(target=worker, args=(rank, workload, rounds, model_vector, sums, barrier))
        for rank in range(workload.workers)
    ]
    for process in workers:
        process.start()
    for _ in range(rounds):
        barrier.wait()
        barrier.wait()
        model_vector.copy_(sums.sum(0) / workload.cohort)
        watch.lap()
    for process in workers:
        process.join()


if __name__ == "__main__":
    main()
