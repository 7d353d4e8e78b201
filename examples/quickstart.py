"""From a random network and a budget to a trained slim one, on scikit-learn's digits; under a minute on a CPU."""

from __future__ import annotations

import pfs_fast as pfs


def main() -> None:
    train, val, test = pfs.data.digits(size=16).loaders(batch_size=64, crop_padding=1)
    model = pfs.models.resnet20()  # random weights; search leaves it as it is

    result = pfs.search(model, train, budget=0.5, config=pfs.SearchConfig(epochs=8))
    print(result.structure)

    slim = result.slim()  # a CifarResNet with fewer channels and fresh weights
    pfs.train(slim, train, val, pfs.TrainConfig(epochs=10))
    pfs.save(slim, "slim.safetensors")

    slim = pfs.load("slim.safetensors", pfs.models.resnet20())
    print(f"test accuracy: {pfs.evaluate(slim, test).top1:.3f}")
    print(f"another budget, same search: {result.structure_for(0.3).macs / 1e6:.1f} M MACs")


if __name__ == "__main__":
    main()
