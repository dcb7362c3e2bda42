# The command `opencoca` on a CPU, with the model that ships with the package.
#
#   docker build --tag opencoca .
#   docker run --rm --volume "$PWD:/data" opencoca caption photo.jpg
#   docker run --rm --volume "$PWD:/data" opencoca train flickr8k --help
FROM python:3.11-slim AS wheel
WORKDIR /source
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim
COPY constraints.txt /tmp/
# From PyTorch's own index comes its build for the CPU; without it the image would hold CUDA's libraries.
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu /wheels/*.whl
RUN useradd --create-home opencoca
USER opencoca
WORKDIR /data
ENTRYPOINT ["opencoca"]
CMD ["--help"]
