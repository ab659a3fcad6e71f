"""How much heavy-ball momentum lengthens a client's way."""


def accumulated(steps: float, momentum: float) -> float:
    """‖a‖₁: to how many gradients the way of so many steps of SGD adds up, (x − y)/η = Σ a_k g_k.

    Momentum ρ in [0, 1) as PyTorch's SGD has it, v ← ρv + g, begun at v = 0: the k-th of τ gradients is in τ − k + 1
    steps, a_k = (1 − ρ^(τ−k+1))/(1 − ρ), so that ‖a‖₁ = (τ − ρ(1 − ρ^τ)/(1 − ρ))/(1 − ρ); τ without momentum. Weight
    decay is part of a gradient. Source: FedNova, Wang et al., arXiv 2007.07481.
    """
    rest = 1 - momentum
    return (steps - momentum * (1 - float(momentum**steps)) / rest) / rest
