//! `rekindle merge`.

use rekindle::{DeviceKind, Merge};

use crate::args::MergeArgs;
use crate::failure::Failure;
use crate::{fetch, output, progress};

pub(crate) fn run(args: &MergeArgs) -> Result<(), Failure> {
    let adapters = args.combine.weighted(&args.adapters)?;
    let mut merge = Merge::weighted(adapters, args.combine.combine).dtype(args.dtype);
    if let Some(base) = &args.model {
        merge = merge.base(base);
    }
    merge = merge.hub(args.hub.access());
    if let Some(revision) = &args.hub.revision {
        merge = merge.revision(revision);
    }
    fetch::say(&merge.fetch(&mut progress::downloading())?);
    merge.write(&args.out, &mut progress::reading("merging"))?;
    if args.verify {
        let found = merge.verify(&args.out, args.device.unwrap_or(DeviceKind::Cpu))?;
        eprintln!(
            "the losses of the adapter and the merged model differ by {:.1e} on average and by {:.1e} at most (bound \
             {:.0e})",
            found.mean, found.largest, found.bound
        );
    }
    output::line(&args.out.display().to_string())
}
