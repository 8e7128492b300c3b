# metadiff on a CPU: docker build --tag metadiff . && docker run --rm --volume "$PWD:/work" metadiff doctor
FROM python:3.12-slim

# torch and torchvision from one index, in one command: the builds without CUDA
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /source
RUN pip install --no-cache-dir '/source[fast,heic,hub]' && rm -rf /source

RUN useradd --create-home metadiff
USER metadiff
ENV METADIFF_CACHE_DIR=/tmp/metadiff-cache
WORKDIR /work
ENTRYPOINT ["metadiff"]
CMD ["--help"]
