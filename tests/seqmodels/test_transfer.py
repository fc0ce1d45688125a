"""Weights of one model in another: what is known of a label stays with it."""

import torch

import seqmodels
from seqmodels import presets
from seqmodels.config import HeadConfig, ModelConfig
from seqmodels.transfer import take_over


def test_a_classifier_that_starts_from_another_keeps_what_it_knows_of_labels_of_the_same_name(tmp_path):
    def classifier(labels, d_model=16):
        backbone = presets.mamba2(d_model, 1, head_dim=8, d_state=4)
        head = HeadConfig(task="sequence", labels=labels)
        return seqmodels.build(ModelConfig(vocab_size=5, backbone=backbone, head=head), seed=len(labels) + d_model)

    ids, old = torch.arange(40).view(2, 20) % 5, classifier(("a", "b", "c"))
    seqmodels.save(old, tmp_path / "old")
    for labels in (("c", "x", "a"), ("b", "a"), ("a", "b", "c")):
        new = classifier(labels)
        own = new.score.weight.clone()
        assert take_over(new, str(tmp_path / "old"))[0] > 2
        with torch.no_grad():
            before, after = old(ids), new(ids)
        for i, label in enumerate(labels):
            if label == "x":
                assert torch.equal(new.score.weight[i], own[i])
            else:
                assert torch.equal(after[:, i], before[:, "abc".index(label)])
    other = classifier(("c", "a"), d_model=24)
    own = other.score.weight.clone()
    take_over(other, str(tmp_path / "old"))
    assert torch.equal(other.score.weight, own)
