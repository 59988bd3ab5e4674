"""The hot arithmetic of training, each operation with one `impl=`: eager or Triton."""

from training.kernels.linear_logprob import TokenLosses, linear_logprob_loss, linear_logprobs

__all__ = ["TokenLosses", "linear_logprob_loss", "linear_logprobs"]
