"""The hot arithmetic of training, each operation with one `impl=`: eager or Triton."""

from training.kernels.linear_logprob import TokenLosses, linear_logprob_loss, linear_logprobs
from training.kernels.scan import discounted_sums

__all__ = ["TokenLosses", "discounted_sums", "linear_logprob_loss", "linear_logprobs"]
