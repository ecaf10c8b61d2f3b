"""Reading a trained run back: weights, text, evaluation."""

import torch

from engine.trained import open_trained
from settings import trained_model


def test_weights_come_back(train_small):
    code, folder, _, _ = train_small("run", "--tokens", 512, "--muon-on", "q,up", "--spectra-every", 0)
    assert code == 0
    for which in ("best", "last"):
        trained = open_trained(folder, which)
        model = trained_model(trained)
        assert torch.equal(model.weights["q"], trained.weights["weights.q"])
        assert model(torch.zeros(1, 4, dtype=torch.long)).shape == (1, 4, trained.config["vocab_size"])
