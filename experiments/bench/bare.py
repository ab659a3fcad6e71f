"""The limit: the plain PyTorch loop, the cohort split over two processes of one thread, averages in shared memory."""

from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from experiments.bench.workloads import WORKERS, WORKLOADS, Stopwatch, Workload, arguments, local_epoch, tensors


def worker(rank: int, workload: Workload, rounds: int, model_vector: Tensor, sums: Tensor, barrier: Any) -> None:
    """Every other client of each round."""
    torch.set_num_threads(1)
    images, labels = tensors()
    model = workload.build()
    parameters = list(model.parameters())
    for server_round in range(rounds):
        barrier.wait()
        total = torch.zeros_like(model_vector)
        for position in range(rank, workload.cohort, WORKERS):
            with torch.no_grad():
                vector_to_parameters(model_vector.clone(), parameters)
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
    sums = torch.zeros(WORKERS, model_vector.numel()).share_memory_()  # type: ignore[no-untyped-call]
    context = mp.get_context("spawn")
    barrier = context.Barrier(WORKERS + 1)
    workers = [
        context.Process(target=worker, args=(rank, workload, rounds, model_vector, sums, barrier))
        for rank in range(WORKERS)
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
