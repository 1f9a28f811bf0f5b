import torch

from apportion.data.digits import digits
from apportion.studies.small_networks import (
    TUNING_SEED,
    CharacterNetwork,
    DigitsNetwork,
    accuracy,
    batches_of,
    best_rate,
    bits_per_character,
    character_batches,
    fit,
    judged,
    loss_of,
    seeded,
)
from apportion.studies.workbench import Workbench


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


def test_the_best_rate_leaves_the_lowest_validation_loss():
    networks, seen = {}, []

    def trained(rate, data, seed):
        seen.append((seed, data))
        network = networks[rate] = seeded(DigitsNetwork, 0)
        return fit(network, batches_of(*data.train, 64, seed), 40, rate)

    rates = (1e-6, 3e-3, 1e-6)
    assert best_rate(Workbench(), "any", [], rates, trained) == 3e-3
    assert [seed for seed, _ in seen] == [TUNING_SEED] * 3
    # Other pictures than any seed that is judged by has, in the same places.
    assert not torch.equal(seen[0][1].train[0], digits(0).train[0])
    data = digits()
    found = judged(networks[3e-3], data)
    assert found == {"accuracy": accuracy(networks[3e-3], data.test), "loss": loss_of(networks[3e-3], data.test)}
    assert found["accuracy"] > judged(networks[1e-6], data)["accuracy"]
