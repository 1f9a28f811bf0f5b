import torch

from apportion.data.digits import digits
from apportion.studies.small_networks import (
    CharacterNetwork,
    DigitsNetwork,
    accuracy,
    batches_of,
    bits_per_character,
    character_batches,
    fit,
    seeded,
)


def test_digits_are_learned():
    data = digits()
    network = seeded(DigitsNetwork, 0)
    assert accuracy(network, data.test) < 0.4
    fit(network, batches_of(*data.train, 64, 0), 150, 3e-3)
    assert accuracy(network, data.test) > 0.85


def test_characters_are_learned_the_same_way_twice():
    codes = torch.arange(2000) % 7
    networks = [
        fit(seeded(lambda: CharacterNetwork(16, 4), 0), character_batches(codes, 32, 1), 60, 1e-2) for _ in range(2)
    ]
    assert bits_per_character(networks[0], codes, 200) < 0.5
    assert all(torch.equal(a, b) for a, b in zip(*(each.parameters() for each in networks), strict=True))
