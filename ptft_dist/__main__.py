"""`python -m ptft_dist` is the `ptft` command: the form that `accelerate launch -m ptft_dist` starts on every rank."""

from ptft_dist.cli import main

if __name__ == "__main__":
    main()
