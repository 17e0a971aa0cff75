"""The train loss of the best constant answer, the mean image: what is not below it has learnt nothing.

python studies/constant_image.py > results/constant-image.txt
"""

from torch.nn import functional

from locobench import data

print("nats per image, train images")
for name in ("curves", "mnist", "usps"):
    images = data.load(name).train
    mean = images.double().mean(0).expand(len(images), -1)
    loss = functional.binary_cross_entropy(mean, images.double(), reduction="sum") / len(images)
    print(f"{loss.item():8.2f}  {name}")
