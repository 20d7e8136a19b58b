"""The peer of the DPO benchmark: TRL's DPOTrainer with a PEFT LoRA on CPU. Prints one line of JSON.

python benchmarks/peers/trl_dpo.py MODEL_FOLDER PAIRS.jsonl [--r 8] [--targets q_proj,v_proj] [--batch 2] [--limit 24]

PAIRS hold {"prompt": [messages], "chosen": [messages], "rejected": [messages]}. A pair's tokens count its prompt twice.
"""

from common import Clock, load, load_tokenizer, lora, options, read_rows, report, settings
from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = options(__doc__, "pairs", batch=2, limit=24, learning_rate=5e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss-type", default="sigmoid")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args)
    pairs = read_rows(args.pairs, args.limit)
    encoded = [
        tokenizer.apply_chat_template(pair["prompt"] + pair[side], tokenize=True, return_dict=False)
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    clock = Clock()
    trainer = DPOTrainer(
        model=load(args),
        args=DPOConfig(**settings(args), beta=args.beta, loss_type=[args.loss_type]),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer,
        peft_config=lora(args),
        callbacks=[clock],
    )
    trainer.train()
    log = trainer.state.log_history
    margins = [float(entry["rewards/margins"]) for entry in log if "loss" in entry]
    extra = {"pairs": len(pairs), "pairs_per_second": len(pairs) / clock.seconds, "margins": margins}
    report("trl-dpo", clock, sum(map(len, encoded)), log, extra)


if __name__ == "__main__":
    main()
