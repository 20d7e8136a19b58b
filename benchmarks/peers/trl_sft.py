"""The peer of the SFT benchmark: TRL's SFTTrainer with a PEFT LoRA on CPU. Prints one line of JSON.

python benchmarks/peers/trl_sft.py MODEL_FOLDER ROWS.jsonl [--r 8] [--targets q_proj,v_proj] [--batch 4] [--limit 48]

ROWS hold {"prompt": [messages], "completion": [messages]}. tokens_per_second counts real tokens, not padding.
"""

import torch
from common import Clock, load, load_tokenizer, lora, options, read_rows, report, settings
from datasets import Dataset
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer


def main() -> None:
    parser = options(__doc__, "rows", batch=4, limit=48, learning_rate=2e-4)
    parser.add_argument("--nf4", action="store_true", help="4-bit base with double quantization (bitsandbytes)")
    args = parser.parse_args()

    tokenizer = load_tokenizer(args)
    rows = read_rows(args.rows, args.limit)
    encoded = [
        tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False)
        for row in rows
    ]
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if args.fp32 else torch.bfloat16,
    )
    model = load(args, **({"quantization_config": quantized, "device_map": {"": "cpu"}} if args.nf4 else {}))
    clock = Clock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**settings(args), completion_only_loss=True),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora(args),
        callbacks=[clock],
    )
    trainer.train()
    report("trl-sft", clock, sum(map(len, encoded)), trainer.state.log_history, {"rows": len(rows)})


if __name__ == "__main__":
    main()
