"""Faults that a test injects into a run, as functions of the token's number in the global batch: the same on any layout
of ranks.

Each takes a pytest.MonkeyPatch (or anything with its setattr) and the first token of the second half of the batch."""

import shutil

import torch

import model


def starve(patch, half: int, experts: list[int], everywhere: bool):
    """The router never picks these experts, in the second half of the batch or everywhere."""
    route = model.LinearRouter.forward

    def forward(self, x_BTD, ctx):
        kept = route(self, x_BTD, ctx)
        if not (self.training and (everywhere or ctx.noise_key[3][0] >= half)):
            return kept
        logits_TE = kept.logits_TE.index_fill(1, torch.tensor(experts), -1e4)
        expert_TK = logits_TE.topk(self.top_k).indices
        return model.Route(expert_TK, logits_TE.gather(1, expert_TK).softmax(-1), kept.logits_TE)

    patch.setattr(model.LinearRouter, "forward", forward)


def no_gradient(patch, half: int, names: tuple[str, ...]):
    """These parameters take no part in the second half of the batch, as behind a branch that its data never reached."""
    forward = model.GPT.forward

    def without(self, *words, **keywords):
        frozen = [self.get_parameter(name) for name in names] if self.training and self.clock[2] >= half else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            return forward(self, *words, **keywords)
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    patch.setattr(model.GPT, "forward", without)


def traced(patch, half: int):
    """Blocks are traced whole, forward and backward, but no code is generated, which would take minutes."""
    compile_function = torch.compile
    patch.setattr(
        torch, "compile", lambda function, **names: compile_function(function, **{"backend": "aot_eager"} | names)
    )
    patch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    torch._dynamo.reset()


ODD = {
    "an expert without tokens in one half": lambda patch, half: starve(patch, half, [0, 3], False),
    "an expert without tokens anywhere": lambda patch, half: starve(patch, half, [2], True),
    "no gradient in one half": lambda patch, half: no_gradient(
        patch, half, ("blocks.1.attention.out", "blocks.0.ffn.router.gate", "embed")
    ),
}

INJECTIONS = ODD | {"traced": traced}
