"""The app of `unchanged` from a module, as `flwr run` takes it: Flower's workers import it too, once each."""

from experiments.bench.unchanged import run

if __name__ == "__main__":
    run()
