"""`jaxformers sample`: text from a trained model."""

import argparse
import codecs
from collections.abc import Iterable
import sys
from typing import BinaryIO

from jaxformers.cli import run_argument
from jaxformers.cli import values

HELP = """\
print text sampled from a trained model
The model is rebuilt from the record in the run directory; no code that lies
there is executed. The same seed gives the same text."""

EPILOG = """\
examples:
  jaxformers sample runs/lm --prompt 'In the beginning'
  jaxformers sample runs/lm --prompt 'And ' --temperature 0.7 --top-p 0.95
  jaxformers sample runs/lm --prompt 'Thou' --prompt 'He' --tokens 80 --seed 3
  jaxformers sample runs/lm --prompt 'Q:' --stop $'\\n' --checkpoint best

One prompt is printed as it grows; of several, each follows a heading.
"""


def configure(parser: argparse.ArgumentParser) -> None:
  """Declares the arguments.

  Args:
    parser: That of the command.
  """
  run_argument.add(parser)
  parser.add_argument(
    '--prompt',
    metavar='TEXT',
    action='append',
    required=True,
    dest='prompts',
    help='what the text continues (may be repeated)',
  )
  parser.add_argument(
    '--tokens',
    metavar='N',
    type=values.whole_number(1),
    default=256,
    help='how many tokens to add at most (default: %(default)s)',
  )
  parser.add_argument(
    '--stop',
    metavar='TEXT',
    help='end a text after this; one token, such as a newline',
  )
  _configure_sampler(parser)


def _configure_sampler(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--temperature',
    metavar='T',
    type=values.number(lambda t: t >= 0, 'a number of at least 0'),
    default=1.0,
    help='0 takes the likeliest token, 1 samples what was learned'
    ' (default: %(default)s)',
  )
  parser.add_argument(
    '--top-k',
    metavar='K',
    type=values.whole_number(1),
    help='sample from the K likeliest tokens only (default: all)',
  )
  parser.add_argument(
    '--top-p',
    metavar='P',
    type=values.number(lambda p: 0 < p <= 1, 'a number in (0, 1]'),
    help='sample from the smallest set with probability P (default: all)',
  )
  parser.add_argument(
    '--seed',
    metavar='S',
    type=values.whole_number(0),
    default=0,
    help='seed of the randomness (default: %(default)s)',
  )


def run(arguments: argparse.Namespace) -> None:
  """Runs the command.

  Args:
    arguments: As parsed.
  """
  opened = run_argument.open_run(arguments, run_argument.classes(arguments))
  pieces = opened.sample(
    prompts=arguments.prompts,
    tokens=arguments.tokens,
    temperature=arguments.temperature,
    top_k=arguments.top_k,
    top_p=arguments.top_p,
    stop=arguments.stop,
    seed=arguments.seed,
  )
  if len(arguments.prompts) == 1:
    continuation = (piece for _, piece in pieces)
    print_stream(arguments.prompts[0], continuation, sys.stdout.buffer)
  else:
    print_all(arguments.prompts, pieces, sys.stdout.buffer)


def print_stream(prompt: str, pieces: Iterable[bytes], out: BinaryIO) -> None:
  """Prints a text as it grows.

  Args:
    prompt: Its beginning.
    pieces: What follows, cut anywhere, also within a character; bytes that are
      not UTF-8 are printed as the replacement character.
    out: Where to.
  """
  decoder = codecs.getincrementaldecoder('utf-8')('replace')
  out.write(prompt.encode('utf-8', 'replace'))
  out.flush()
  for piece in pieces:
    out.write(decoder.decode(piece).encode('utf-8'))
    out.flush()
  out.write(decoder.decode(b'', final=True).encode('utf-8') + b'\n')
  out.flush()


def print_all(
  prompts: list[str], pieces: Iterable[tuple[int, bytes]], out: BinaryIO
) -> None:
  """Prints several texts, each below a heading.

  Args:
    prompts: Their beginnings.
    pieces: Number of the text and bytes to add to it.
    out: Where to.
  """
  texts = [bytearray() for _ in prompts]
  for row, piece in pieces:
    texts[row] += piece
  for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
    heading = f'--- {row + 1} of {len(prompts)}: {prompt!r}\n'
    out.write(heading.encode('utf-8', 'replace'))
    print_stream(prompt, [bytes(text)], out)
