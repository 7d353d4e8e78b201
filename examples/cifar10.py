"""The paper's CIFAR-10 experiment: search a widened network, cut it to a share of the original's MACs, train it.

    python examples/cifar10.py cifar10.npz --model vgg16 --budget 0.5

The defaults are the paper's and take a GPU; `--max-steps 500 --epochs 10` makes a short run of it.
"""

from __future__ import annotations

import argparse

import torch

import pfs_fast as pfs

NETWORKS = ("vgg16", "vgg19", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110")


def main() -> None:
    args = parse_arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    splits = pfs.data.cifar10(args.data)
    print(splits)
    train, val, test = splits.loaders(batch_size=128, eval_batch_size=500, device=device)
    if test is None:
        raise SystemExit(f"{args.data} must hold x_test and y_test")

    base = pfs.models.get(args.model)
    wide = pfs.models.get(args.model, expansion=args.expansion)
    config = pfs.SearchConfig(max_steps=args.max_steps, scope=args.scope)
    result = pfs.search(wide, train, args.budget, config=config, reference=base, device=device)
    result.save(f"{args.out}.search.safetensors")
    print(result.structure)

    slim = result.slim().to(device)
    share = args.budget if args.scratch_b else None
    recipe = pfs.TrainConfig.cifar(epochs=args.epochs, budget_training=share)
    pfs.train(slim, train, val, recipe)
    pfs.save(slim, f"{args.out}.safetensors")
    print(f"test accuracy: {pfs.evaluate(slim, test).top1:.4f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "data", help=".npz with x_train, y_train, x_test, y_test, or torchvision's folder"
    )
    parser.add_argument("--model", default="vgg16", choices=NETWORKS)
    parser.add_argument("--expansion", type=float, default=1.25, help="widening before the search")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the original's MACs")
    parser.add_argument("--scope", default="paper", choices=("paper", "all"))
    parser.add_argument("--max-steps", type=int, help="end the search after so many steps")
    parser.add_argument(
        "--epochs", type=int, default=160, help="epochs of the full network's recipe"
    )
    parser.add_argument(
        "--scratch-b", action="store_true", help="as much computation as the original"
    )
    parser.add_argument("--out", default="slim", help="beginning of the names of the files written")
    return parser.parse_args()


if __name__ == "__main__":
    main()
