from .language_model import causal_lm_loss as causal_lm_loss
