"""Synthetic sample lengths and picture sizes, to judge packing and balance without a dataset."""

import numpy as np

IMAGE_SHARE = 0.8
_IMAGE_TEXT = (35, 1.2)
_CHAT_TEXT = (500, 1.2)
_SHORTEST = 16
_SIZES = {
    # Three quarters as COCO's (VQAv2 and captions), a quarter as Open Images' (TextVQA).
    (640, 480): 0.27,
    (480, 640): 0.09,
    (640, 427): 0.21,
    (427, 640): 0.07,
    (500, 375): 0.06,
    (640, 640): 0.05,
    (1024, 768): 0.12,
    (768, 1024): 0.05,
    (1024, 683): 0.06,
    (1024, 1024): 0.02,
}


def ghostvis_mix(
    count: int, *, seq_length: int, tokens_per_image: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths like those of an instruction mix for vision-language training.

    80 % of the samples have one picture of `tokens_per_image` positions and text whose length is
    log-normal with median 35 and sigma 1.2 (short questions, some long descriptions); 20 % are
    chat with a log-normal length of median 500 and sigma 1.2. Texts have at least 16 tokens;
    samples longer than `seq_length` are left out, as a plan does. The four numbers are a fit, not
    measured lengths: at 4096 they give 26.8 % fullness under pad-to-longest, 88.4 % under next-fit
    and 12.8 images a sequence, where the study of packing that this mix comes from says 26 %,
    87.9 % and 12.3. How full `balanced` gets does not depend on the fit: 0.1 % of padding with this
    one and with seven others.

    Returns:
        int64 lengths with the picture expanded, and int64 pictures, one a sample.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    images = (generator.random(count) < IMAGE_SHARE).astype(np.int64)
    noise = generator.standard_normal(count)
    median = np.where(images == 1, _IMAGE_TEXT[0], _CHAT_TEXT[0])
    sigma = np.where(images == 1, _IMAGE_TEXT[1], _CHAT_TEXT[1])
    text = np.maximum(_SHORTEST, np.rint(median * np.exp(sigma * noise))).astype(np.int64)
    lengths = text + images * tokens_per_image
    fits = lengths <= seq_length
    return lengths[fits], images[fits]


def picture_sizes(count: int, *, seed: int) -> np.ndarray:
    """int64 [count, 2]: width and height of the mix's pictures in their own resolution.

    Ten sizes with rough shares: common resolutions of the data sets that the mix is made of, not a
    census of them.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    chosen = generator.choice(len(_SIZES), size=count, p=list(_SIZES.values()))
    return np.array(list(_SIZES), dtype=np.int64)[chosen]
