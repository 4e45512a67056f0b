//! `rekindle merge`.

use rekindle::{DeviceKind, Merge};

use crate::args::{HubArgs, MergeArgs};
use crate::failure::Failure;
use crate::{fetch, output, progress};

pub(crate) fn run(args: &MergeArgs) -> Result<(), Failure> {
    let adapters = args.combine.weighted(&args.adapters)?;
    let mut merge = Merge::weighted(adapters, args.combine.combine).dtype(args.dtype);
    if let Some(base) = &args.model {
        merge = merge.base(base);
    }
    let HubArgs { revision, cache_dir, local_files_only } = &args.hub;
    merge = merge.local_files_only(*local_files_only);
    if let Some(revision) = revision {
        merge = merge.revision(revision);
    }
    if let Some(cache_dir) = cache_dir {
        merge = merge.cache_dir(cache_dir);
    }
    fetch::say(&merge.fetch(&mut progress::downloading())?);
    merge.write(&args.out, &mut progress::reading("merging"))?;
    if args.verify {
        let found = merge.verify(&args.out, args.device.unwrap_or(DeviceKind::Cpu))?;
        eprintln!(
            "losses of adapter and merged model differ by {:.1e} on the mean and {:.1e} at most (bound {:.0e})",
            found.mean, found.largest, found.bound
        );
    }
    output::line(&args.out.display().to_string())
}
