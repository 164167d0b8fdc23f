"""Make `fusedact/mnist.npz`, the subset of MNIST that the package carries, from a folder of the IDX files.

    python tools/embed_mnist.py FOLDER

MNIST is the work of Yann LeCun, Corinna Cortes and Christopher J. C. Burges, who license it CC BY-SA 3.0;
the subset is theirs under the same license.

4,000 images to train on and 1,000 to test on, as many of each digit, evenly spaced through the file and in
its order. Not the first ones: census workers wrote the first half of the test file, which is easier than the
second, by students, so accuracy on its first 1,000 would flatter. The same files give the same bytes.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fusedact.data import mnist


def balanced(labels: Tensor, count: int) -> Tensor:
    """Indices, int64 (count,), of count / 10 images of each digit."""
    each = torch.arange(count // 10)
    places = [torch.nonzero(labels == digit).flatten() for digit in range(10)]
    return torch.cat([place[each * len(place) // len(each)] for place in places]).sort().values


def main() -> None:
    parser = argparse.ArgumentParser(description="Make fusedact/mnist.npz from MNIST's IDX files.")
    parser.add_argument("folder", type=Path)
    digits = mnist(parser.parse_args().folder)
    train, test = balanced(digits.train_labels, 4000), balanced(digits.test_labels, 1000)
    np.savez_compressed(
        Path(__file__).parents[1] / "fusedact" / "mnist.npz",
        train_images=digits.train_images[train].numpy(),
        train_labels=digits.train_labels[train].numpy(),
        test_images=digits.test_images[test].numpy(),
        test_labels=digits.test_labels[test].numpy(),
    )


if __name__ == "__main__":
    main()
