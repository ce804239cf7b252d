# ruff: noqa: RUF012
"""Directions of a user's own. docs/directions.md quotes the first one."""

import ksag

# region: docs/directions.md


def skipped(args, kwargs, output):
    return args[0]  # the block's output is its input


class SkipBlock(ksag.Direction):
    """Guides away from the conditional prediction without one block."""

    name = "skip"
    keywords = {"skip_scale": "scale"}  # in extra_args, skip_scale replaces scale

    def __init__(self, scale, path, **settings):
        super().__init__(scale, modules=[path], **settings)

    def ask(self, call):
        return [ksag.Ask(call.x, call.cond, output=skipped)]

    def direction(self, call, answers):
        return call.g - answers[0]


# endregion


def neighbours(attention):
    return attention.image_values.roll(1, dims=2)


class PerturbTokens(ksag.Direction):
    """Away from the conditional prediction in which each token attends to the one before it alone."""

    name = "tokens"
    keywords = {"token_scale": "scale"}

    def ask(self, call):
        return [ksag.Ask(call.x, call.cond, attention=neighbours)]

    def direction(self, call, answers):
        call.keep(perturbed=answers[0])
        return call.g - answers[0]
