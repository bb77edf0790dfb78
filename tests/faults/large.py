"""Rows by the hundred thousand: what reading them costs, in seconds and memory, each in a process of its own.

    python tests/faults/large.py 1000000 big.jsonl      # mild synthetic preferences, about 1 kB a row
"""
import json
import random
import sys

WORDS = ('the a garden bicycle kettle letter morning recipe window river market lesson holiday blanket candle ladder music '
         'gentle quiet bright simple careful warm early often slowly mostly first then water paint mend carry open share learn '
         'measure plan rest listen walk choose keep write begin with from under beside before after and or if because').split()


def preferences(n, size=430):
    "Rows of PKU-SafeRLHF's native layout, the same for every call; two in three prompts occur twice. `size`: characters of an answer."
    g = random.Random(0)
    text = ' '.join(g.choice(WORDS) for _ in range(20_000))
    def words(length):
        start = text.index(' ', g.randrange(len(text) - length - 20)) + 1
        return text[start:start + length].strip()
    for i in range(n):
        a, b = words(size + g.randrange(-80, 80)), words(size + g.randrange(-80, 80))
        safe = g.random() < .6, g.random() < .6
        safer = int(safe[1]) if safe[0] != safe[1] else g.randrange(2)
        yield dict(prompt=f'Question {i * 2 // 3}: how do I {words(60)}?', response_0=f'{a}, {i}.', response_1=f'{b}, {i}!',
                   better_response_id=g.randrange(2), safer_response_id=safer, is_response_0_safe=safe[0], is_response_1_safe=safe[1])


def write(path, n):
    with open(path, 'w', encoding='utf-8') as f: f.writelines(json.dumps(r) + '\n' for r in preferences(n))


if __name__ == '__main__': write(sys.argv[2], int(sys.argv[1]))
