"""CLIPModel with our loss: the lines of docs/recipes.md, and what `Trainer` makes of them."""

import pytest
import torch

from . import pages, peer
from .agreement import same

transformers = peer("transformers")
recipe = pages.run("recipes.md", "Hugging Face CLIPModel")


def make(model_class):
    """A tiny one, always with the same weights; no download."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text = sizes | dict(vocab_size=30, max_position_embeddings=9, eos_token_id=29)
    vision = sizes | dict(image_size=8, patch_size=4)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return model_class(config).double()


def batch(N, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 29, (N, 7), generator=draw)
    ids[:, -1] = 29
    pixels = torch.randn(N, 3, 8, 8, generator=draw, dtype=torch.float64)
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))


def test_the_loss_and_its_gradients():
    found = []
    for model in make(recipe.FusedCLIPModel), make(transformers.CLIPModel):
        out = model(**batch(6), return_loss=True)
        out.loss.backward()
        gradients = [x.grad for _, x in sorted(model.named_parameters())]
        found.append([out.loss.detach(), out.text_embeds.detach(), out.image_embeds.detach(), *gradients])
    same(*found)
    assert found[0][-1] is not None and len(found[0]) > 20


def test_the_logits_are_there_without_the_loss():
    ours, theirs = (make(x)(**batch(3), return_loss=False) for x in (recipe.FusedCLIPModel, transformers.CLIPModel))
    assert torch.equal(ours.logits_per_image, theirs.logits_per_image) and ours.loss is theirs.loss is None
    loss = make(recipe.FusedCLIPModel)(**batch(3))
    assert loss.logits_per_image is None and loss.loss > 0


def test_checkpoints_are_the_same(tmp_path):
    make(transformers.CLIPModel).save_pretrained(tmp_path)
    ours = recipe.FusedCLIPModel.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "back")
    theirs = transformers.CLIPModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in ours.state_dict().items())


@pytest.mark.slow
def test_twenty_steps_of_trainer(tmp_path):
    samples = [{name: x[0] for name, x in batch(1, seed).items()} for seed in range(24)]

    def collated(samples):
        return torch.utils.data.default_collate(samples) | dict(return_loss=True)

    weights = []
    for model_class in recipe.FusedCLIPModel, transformers.CLIPModel:
        model = make(model_class)
        options = dict(output_dir=tmp_path, max_steps=20, per_device_train_batch_size=8, learning_rate=0.1, optim="sgd")
        options |= dict(lr_scheduler_type="constant", save_strategy="no", report_to=[], use_cpu=True, seed=3)
        options |= dict(disable_tqdm=True, remove_unused_columns=False, logging_strategy="no")
        arguments = transformers.TrainingArguments(**options)
        trainer = transformers.Trainer(model, arguments, train_dataset=samples, data_collator=collated)
        trainer.train()
        assert trainer.state.global_step == 20
        weights.append([x.detach() for _, x in sorted(model.named_parameters())])
    same(*weights, within=1e-8)
    before = [x for _, x in sorted(make(transformers.CLIPModel).named_parameters())]
    assert not any(torch.equal(a, b) for a, b in zip(weights[0], before, strict=True) if a.ndim > 1)
