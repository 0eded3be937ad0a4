//! stub
#[derive(clap::Args, Default)]
pub(crate) struct Args {}
pub(crate) fn main(_: &Args) -> anyhow::Result<std::process::ExitCode> {
    Ok(std::process::ExitCode::SUCCESS)
}
