"""Drawing tokens from language models."""

from jaxformers.decode.generate import Generated
from jaxformers.decode.generate import generate
from jaxformers.decode.generate import stream
from jaxformers.decode.sampling import Sampler
from jaxformers.decode.sampling import apply_temperature
from jaxformers.decode.sampling import keep_top_k
from jaxformers.decode.sampling import keep_top_p
